"""The run folder: its creation, going on with a run, sweeps, the summary, and reading metrics.csv.

launch.py   what train.py does around a training: which folder, which run, how it ends
folder.py   a new folder, the lock on it, config.yaml and overrides.yaml
resume.py   which run to go on with, and its settings
sweep.py    the jobs of a sweep, sweep.csv and sweep.png
summary.py  summary.json
metrics.py  reading metrics.csv
loggers.py  settings of loggers that depend on the run
process.py  the process that a run is in: its rank, its memory, its warnings
versions.py which code and which packages made a result
"""
