"""The tables: `python -m benches.tables`. Nothing heavy is imported here: a worker sets its environment first."""
