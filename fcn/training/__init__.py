"""What surrounds a training step: the trainer's arguments, callbacks and loggers, one in a file.

train.py builds the callbacks that conf/callbacks/*.yaml names by their import paths, and the
loggers of conf/logger/*.yaml, with `fcn.cli.build_each`. Every run also has the logger of
metrics_csv.py, and the callbacks without which it could not be stopped, resumed or evaluated
correctly: `Clock`, `RunRecord`, `ResumedSettings`, `DropoutSeeds` and `Interruption`. trainer.py
adds these. A callback finds the run folder in `trainer.default_root_dir`.
"""
