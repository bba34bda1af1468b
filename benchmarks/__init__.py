"""``python -m benchmarks``: our kernels and models beside what users would pick instead, checked before they are timed.

`cases/` lists what is measured, `gpu/` and `cpu/` make it run beside its peers, `ready.py` starts the server,
`workers.py` has processes get ready side by side, `measure.py` checks and times, `results.py` keeps the rows,
`tables.py` puts them into the documents. Only this program writes `results/`.
"""
