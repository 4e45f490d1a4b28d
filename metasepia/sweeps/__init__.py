"""Sweeps whose table does not depend on luck: `plan` fixes trials and packs by index, `store` keeps what was computed
as write-once objects at a `pyarrow.fs` URI, `run` is the loop of one pack. No Ray here: `jobs.sweeping` schedules."""
