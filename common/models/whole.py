"""How a model comes by its numbers where nothing is cut."""


def load_whole(model_class, name, **options):
    """As model_class.from_pretrained with output_loading_info. Returns: (model, info)."""
    return model_class.from_pretrained(name, output_loading_info=True, **options)


def build_whole(make):
    """What a function without arguments returns."""
    return make()
