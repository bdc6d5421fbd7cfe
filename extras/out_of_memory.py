"""One line for work that needs more memory than there is."""

import functools


def names_flag_when_out_of_memory(name: str):
    """Decorate a method of Run: an allocator's error becomes one line that names the flag to lower, with an estimate."""

    def decorate(method):
        @functools.wraps(method)
        def wrapped(self, *args, **kwargs):
            try:
                return method(self, *args, **kwargs)
            except (RuntimeError, MemoryError) as error:
                from extras.memory import explain_out_of_memory

                explain_out_of_memory(error, self.args, name)
                raise

        return wrapped

    return decorate
