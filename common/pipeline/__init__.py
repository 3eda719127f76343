"""Everything from one YAML: environment, data, tokenizer, pretraining, fine-tuning, collection, submission, report."""
