from __future__ import annotations


def open_coco(request):
    raise NotImplementedError


def open_karpathy(request):
    raise NotImplementedError


def open_visual_genome(request):
    raise NotImplementedError
