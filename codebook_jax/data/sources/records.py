from __future__ import annotations


def open_records(request):
    raise NotImplementedError
