"""Trees that a command can use before they are on disk: a file system whose files come out of git when they are read.

`plan` lists a commit, `table` is that list as a file, `server` is the program that mounts it, and `mounts` the
platform's end of that program. The whole tree is written to disk meanwhile (`builders`).
"""
