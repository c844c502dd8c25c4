"""Opens a page in headless Chromium, runs a script in it, and returns its findings and the
browser's complaints.
"""

import json
import re
import shutil
import subprocess

import pytest

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--disable-dev-shm-usage --enable-logging=stderr --v=0 --dump-dom"
).split()

# What both pages must do: every chart has ink, and pointing at one shows other values than its last
# ones.
CHARTS = """
    const inked = canvas => {
        const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        return pixels.some((value, at) => at % 4 === 3 && value > 0);
    };
    const canvases = [...document.querySelectorAll(".plot canvas")];
    found.charts = canvases.length;
    found.empty = canvases.filter(canvas => !inked(canvas)).length;
    const legend = () => document.querySelector(".plot .u-legend").innerText;
    const before = legend();
    const over = document.querySelector(".plot .u-over");
    const box = over.getBoundingClientRect();
    const [clientX, clientY] = [box.left + box.width / 2, box.top + box.height / 2];
    const at = { clientX, clientY, bubbles: true };
    over.dispatchEvent(new MouseEvent("mouseenter", at));
    over.dispatchEvent(new MouseEvent("mousemove", at));
    await settled();
    found.hovered = [before, legend()];
    const plot = document.querySelector(".plot");
    plot.dispatchEvent(new KeyboardEvent("keydown", { key: "Home", bubbles: true }));
    await settled();
    found.spoken = document.getElementById("spoken").textContent;
    found.wider = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    found.broken = [...document.images].filter(image => !image.src || !image.naturalWidth).length;
"""


def look(page, script, tmp_path, width=1400):
    """What `script` put into `found`, with the browser's complaints as "complaints"; skips the test
    without Chromium.
    """
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    # All within the load event, before which the page is not printed: microtasks, no timers.
    injected = f"""<script>window.addEventListener("load", async () => {{
        const found = {{}};
        const settled = async () => {{ for (let turn = 0; turn < 9; turn++) await null; }};
        const answer = document.createElement("pre");
        answer.id = "answer";
        try {{ {script} }}
        catch (error) {{ found.error = String(error.stack); }}
        answer.textContent = JSON.stringify(found);
        document.body.append(answer);
    }});</script></body>"""
    copy = tmp_path / "looked_at.html"
    copy.write_text(page.read_text().replace("</body>", injected))
    profile = tmp_path / "profile"
    command = [CHROMIUM, *QUIET, f"--user-data-dir={profile}", f"--window-size={width},2000"]
    done = subprocess.run([*command, copy.as_uri()], capture_output=True, text=True, timeout=60)
    answer = re.search(r'<pre id="answer">(.*?)</pre>', done.stdout, re.DOTALL)
    assert answer, done.stderr[-2000:]
    text = answer.group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    complaints = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(text) | {"complaints": complaints}


def check_page(found):
    """Asserts what holds for both pages once `CHARTS` has run."""
    assert "error" not in found and not found["complaints"], found
    assert not found["empty"] and not found["broken"] and found["wider"] <= 0, found
