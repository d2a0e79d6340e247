"""What transformers says while a test runs."""

import logging


class WarningsOfTransformers(logging.Handler):
    """Collects records of level warning and above; the library's logger keeps them from pytest's own collector."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())

    def __enter__(self):
        logging.getLogger("transformers").addHandler(self)
        return self.messages

    def __exit__(self, *error):
        logging.getLogger("transformers").removeHandler(self)
