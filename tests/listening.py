"""What transformers and this package log while a test runs."""

import logging


class WarningsOfTransformers(logging.Handler):
    """Collects records of level warning and above; the libraries' loggers keep them from pytest's own collector."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []
        self.loggers = [logging.getLogger(name) for name in ("transformers", "m2f_hf")]

    def emit(self, record):
        self.messages.append(record.getMessage())

    def __enter__(self):
        for logger in self.loggers:
            logger.addHandler(self)
        return self.messages

    def __exit__(self, *error):
        for logger in self.loggers:
            logger.removeHandler(self)
