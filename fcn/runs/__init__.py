"""The run folder: how it is created, resumed and read, and the folders of sweeps.

launch.py    called by train.py: chooses the run folder, resumes a run, reports how it ended
folder.py    creates and locks a run folder, and writes its config.yaml and overrides.yaml
resume.py    finds the run to resume, and reads its settings
sweep.py     runs the jobs of a sweep, and writes sweep.csv and sweep.png
metrics.py   reads metrics.csv
loggers.py   fills in the settings of loggers that depend on the run
process.py   the rank and the memory of this process, and which warnings it shows
versions.py  the versions of the code and of the packages that made a result

fcn/training/fit.py writes summary.json when training ends.
"""
