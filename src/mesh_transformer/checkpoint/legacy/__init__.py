"""The original's checkpoints, in and out: v1 shards and the v2 layout (docs/formats.md, sections 1 and 8)."""
