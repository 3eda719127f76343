"""Raw text to token files, once: what prepare_pile_data.py is made of."""
