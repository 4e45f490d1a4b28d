"""Programs that start, finish and leave files: `train_reasoning`, `train_experts`. Run with `python -m jobs.NAME`."""
