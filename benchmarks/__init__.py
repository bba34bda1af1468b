"""``python -m benchmarks``: our kernels and models beside what users would pick instead, checked before they are timed.

`cases/` lists what is measured, `gpu/` and `cpu/` make it run beside its peers, `measure.py` checks and times it,
`workers.py` has processes prepare it side by side, `ready.py` starts the server, `results.py` keeps the rows, `tables.py`
puts them into the documents. Only this program writes `results/`.
"""
