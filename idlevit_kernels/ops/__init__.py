"""The ops: declared in ``library``, documented and checked in ``functional``, specified in ``reference``."""
