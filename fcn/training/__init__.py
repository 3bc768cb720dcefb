"""What surrounds a training step: the trainer's arguments, callbacks and loggers, one in a file.

    callbacks: conf/callbacks/*.yaml names them by import path; fcn.cli.build makes them
    loggers:   conf/logger/*.yaml does the same; fcn.training.metrics_csv is in every run

Callbacks that a run cannot be right without (`Clock`, `RunRecord`, `DropoutSeeds`, `Preemption`,
`LoaderFailure`) are added by train.py. The run folder is `trainer.default_root_dir`.
"""
