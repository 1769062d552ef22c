"""The command `ep-rebalance`: `app`, and its commands.

A command that computes has two modules. The first holds its options and their help, and imports nothing else
that takes time, since `--help` and a wrong option need no more. The second does the work, and is imported
when the command runs.

| command | options and help | work |
|---|---|---|
| advise | advise | advising |
| convert | convert | converting |
| doctor | doctor | diagnosing |
| inspect | inspection | inspecting |
| plan | plan | planning |
| record | record | recording |
| replay | replay | replaying |

Commands that print what is known have one: `reference`, `dashboards`, `status`. `options` and `choices` are
what several commands declare. All others are parts of the work.
"""
