"""``make contract``: what the package rests on, checked against the real API by whoever has a key, and against the simulator otherwise."""
