"""A seeded generator of wrong inputs for all commands, each tried in a forked process.

python -m tests.hostile --first 0 --draws 50000 --workers 2      # prints what went wrong, with seeds
python -m tests.hostile --seed 1234                              # one draw, with its command and output
"""
