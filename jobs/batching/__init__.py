"""Parquet through the running graph: `spec` says what is asked of which rows, `reading` brings them a part at a time,
`tasks` turns rows into requests and answers into columns, `asking` sends them until they are answered, `running` keeps
a bounded number on the way, `parts` keeps what is done.
"""
