"""Before anything runs: does it fit, how fast would it be, what would it cost. Formulas only; docs/planning.md."""
