"""All tasks, many seeds: plan and run fine-tuning runs of run_glue.py, and sum them up."""
