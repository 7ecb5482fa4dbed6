"""Tasks for lmms-eval (`--include_path eval/lmms_tasks`): Object HalBench, MMHal-Bench and AMBER's two parts."""
