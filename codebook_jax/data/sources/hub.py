from __future__ import annotations


def open_hugging_face(request):
    raise NotImplementedError
