"""Pictures of the page, made by `python -m docs.page`."""
