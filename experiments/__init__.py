"""Commands, each `python -m experiments.NAME --help`; experiment files are in `configs/`.

`run`, `sweep` and `report` train, launch and show a study; `data` looks at its data; `test_time_compute` samples
trained members; `convert` and `multiple_choice` exchange models with transformers; `fit_check` and `fit_table` ask
compilers what fits; `benchmark` measures; `chaos` kills and compares.
"""
