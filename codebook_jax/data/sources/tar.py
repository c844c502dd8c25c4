from __future__ import annotations


def open_webdataset(request):
    raise NotImplementedError
