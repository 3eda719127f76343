"""Model presets, and stock transformers models with a language-model head on the masked positions alone."""
