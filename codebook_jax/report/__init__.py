"""Pages for people to read, each one self-contained HTML file: that of a run (`run.py`) and that of
check-data (`tools/check_data/page.py`), made of one template, stylesheet and script.
"""
