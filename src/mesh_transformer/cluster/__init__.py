"""Training on machines that are not this one: TPU VMs, Ray clusters."""
