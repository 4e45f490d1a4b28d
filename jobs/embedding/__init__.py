"""Embedding many tasks at once: `spec` reads what is wanted (`toml` with its places), `data_sets` labelled tables,
`plan` makes tasks with the key of each one's answers, `work` answers and embeds in one process, `running` does so on
Ray, `files` keeps what was answered and embedded, `progress` and `report` tell. The command is `jobs.embed_tasks`."""
