"""`make gpu`: run.py drives the parts, compile.py to learn.py are them; launches.py is shared."""
