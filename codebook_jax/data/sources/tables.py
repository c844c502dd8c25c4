from __future__ import annotations


def open_csv(request):
    raise NotImplementedError


def open_tsv(request):
    raise NotImplementedError
