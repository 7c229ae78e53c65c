"""The playground in a real browser, as visitors use it. Screenshots are left in `screenshots/`."""

import base64
import contextlib
import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_genarm import demo
from hf_genarm.hub.sentence import DEFAULT_STRENGTH
from hf_genarm.scripts.demo import SENTENCE

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
pytest.importorskip("gradio", reason="gradio is not installed: pip install -e '.[demo]'")
from hf_genarm.playground.page import MAX_SENTENCES  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.flaky(reruns=2),  # a browser on a busy machine may be late (pytest-rerunfailures)
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no browser: apt-get install chromium chromium-driver"),
]

ROOT = Path(__file__).parent.parent
SCREENSHOTS = ROOT / "screenshots"
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
SIZES = {"wide": (1440, 1500), "narrow": (390, 2600)}
ALONE = ["#prompt", "#run", "#stop", "#new", "#sentence-0", "#sentence-strength-0", "#strength-0"]
ALONE += ["#strength-1", "#strength-2", "#temperature", "#seed", "#tokens", "#reference", "#asked", "#unguided"]
ALONE += ["#guided", "#facts", "#measure", "#picture", "#code", "#own"]
TIMEOUT = 180  # seconds; the machine may have other things to do


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(what, timeout=TIMEOUT):
    """What it returns once it is true."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.05)
    raise AssertionError(f"Nothing happened in {timeout} s.")


@contextlib.contextmanager
def serving(command, folder, log):
    """The address of a server that runs meanwhile."""
    port = free_port()
    environment = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        command = [sys.executable, *command]
        server = subprocess.Popen(command, cwd=folder, env=os.environ | environment, stdout=file, stderr=file)
    try:
        wait_for(lambda: server.poll() is not None or "Running on local URL" in log.read_text())
        assert server.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def address(folder):
    with serving(["tests/serve_tiny.py", str(folder)], ROOT, folder / "log") as address:
        yield address


@pytest.fixture(scope="module")
def real_address(tmp_path_factory):
    demo.demo_model()
    with serving(["-m", "hf_genarm.cli", "demo"], ROOT, tmp_path_factory.mktemp("demo") / "log") as address:
        yield address


class Page:
    def __init__(self, address, profile, size="wide", theme="light", unfolded=True):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        width, height = SIZES[size]
        for argument in [*ARGUMENTS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]:
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "narrow"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(f"{address}/?__theme={theme}")
        wait_for(lambda: self.all("#new textarea, #new input") and self.all("#run"))
        if unfolded:
            for accordion in self.all("button.label-wrap"):
                accordion.click()
            wait_for(lambda: all(self.all(x) for x in ("#seed", "#code", "#load")))
        time.sleep(1)  # until the session has begun

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def text(self, selector):
        """As it is written, also what is folded away."""
        read = "return document.querySelector(arguments[0])?.textContent ?? ''"
        return self.driver.execute_script(read, selector)

    def write(self, selector, text):
        (field,) = self.all(f"{selector} textarea, {selector} input")[:1]
        field.send_keys(webdriver.Keys.CONTROL, "a")
        field.send_keys(text)

    def press(self, selector):
        element = self.all(selector)[0]
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def to_the_end(self, slider):
        """Moves a slider to its lowest value, with the keyboard."""
        self.all(f"{slider} input[type=range]")[0].send_keys(webdriver.Keys.HOME)

    def ask(self, prompt):
        """Asks, and waits until the answer before is gone."""
        self.write("#prompt", prompt)
        self.press("#run")
        wait_for(lambda: prompt in self.text("#asked"))

    def run(self, prompt, seed=0, while_it_writes=None):
        """Both answers, once they are complete."""
        self.write("#seed", str(seed))
        self.ask(prompt)
        if while_it_writes is not None:
            while_it_writes()
        self.complete()
        return self.answers()

    def complete(self):
        wait_for(lambda: "minus the base" in self.text("#facts") and "GenARMLogitsProcessor" in self.text("#code"))

    def add(self, sentence):
        field = self.all("#new textarea, #new input")[0]
        field.send_keys(sentence, webdriver.Keys.ENTER)

    def answers(self):
        """Both as far as they are written, without a character whose last bytes are missing."""
        return [self.text(f"#{side} .answer span").rstrip("�") for side in ("unguided", "guided")]

    def picture(self, path):
        """Of the whole page."""
        size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        options = {"captureBeyondViewport": True, "clip": {**size, "scale": 1}}
        path.write_bytes(base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]))

    def errors(self):
        return [entry for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture
def open_page(request, tmp_path):
    pages = []

    def open_one(*args, of="address"):
        pages.append(Page(request.getfixturevalue(of), tmp_path / str(len(pages)), *args))
        return pages[-1]

    yield open_one
    for page in pages:
        page.driver.quit()


PROMPT = "What did you think of the hotel? Answer in two sentences."


def test_two_answers_stream_and_a_slider_acts_from_then_on(open_page):
    page, seen = open_page(), []

    def watch():
        for _ in range(3):
            last = page.answers()
            wait_for(lambda: page.answers() != last)  # noqa: B023
            seen.append(page.answers())

    unguided, guided = page.run(PROMPT, 1, watch)
    assert len({tuple(answers) for answers in seen}) == 3
    assert all(unguided.startswith(left) and guided.startswith(right) for left, right in seen[1:])
    assert unguided != guided
    assert page.all("#picture .genarm-token[tabindex]")
    assert page.all("#picture svg")

    def move():
        wait_for(lambda: 15 < len(page.answers()[1]) < len(guided) - 20 and guided.startswith(page.answers()[1]))
        page.to_the_end("#sentence-strength-0")

    still, moved = page.run(PROMPT, 1, move)
    assert still == unguided
    assert moved != guided
    assert moved[:15] == guided[:15]
    assert "if step >=" in page.text("#code")
    assert page.errors() == []


def test_stop(open_page):
    page = open_page()

    def stop():
        wait_for(lambda: len(page.answers()[1]) > 15)
        page.press("#stop")
        seen.append(page.answers()[1])

    seen = []
    page.write("#tokens", "256")
    _, guided = page.run("Tell me a long story about a train.", 0, stop)
    assert guided.startswith(seen[0])
    (n_tokens,) = {int(x.text) for x in page.all("#facts tr:nth-child(2) td")[1:]}
    assert 2 < n_tokens < 200


def test_html_stays_text_and_limits_are_said(open_page):
    page = open_page()
    page.run("<img src=x onerror=document.title='hit'><b id=bold>Hi</b> {{7*7}}")
    assert "<img src=x" in page.text("#code")
    assert not page.all("#bold, img[src=x]")
    assert page.driver.title != "hit"
    page.driver.execute_script(
        "const field = document.querySelector('#prompt textarea'); field.value = 'train '.repeat(900);"
        "field.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    page.press("#run")
    wait_for(lambda: "at most 512 are allowed" in page.text("body"))
    assert page.errors() == []


def test_two_visitors_at_once(open_page):
    pages = [open_page(), open_page()]
    pages[0].to_the_end("#strength-0")
    pages[1].to_the_end("#strength-1")
    time.sleep(1)
    for page in pages:
        page.ask(PROMPT)
    for page in pages:
        page.complete()
    strengths = [re.search(r"processor.alpha = (\[.*?\])", page.text("#code")).group(1) for page in pages]
    assert strengths == [f"[{DEFAULT_STRENGTH}, -3.0]"] * 2
    for page, name in zip(pages, ("arm-0", "arm-1"), strict=True):
        assert name in page.text("#code")
    assert pages[0].answers()[0] == pages[1].answers()[0]  # the same seed
    assert pages[0].answers()[1] != pages[1].answers()[1]


def test_sentences_are_added_edited_and_removed(open_page):
    page = open_page()
    assert page.all("#sentence-0 textarea")[0].get_attribute("value") == SENTENCE
    assert not any(x.is_displayed() for x in page.all("#sentence-1"))
    page.add("Answer like a pirate.")
    wait_for(lambda: [x for x in page.all("#sentence-1 textarea") if x.is_displayed()])
    page.write("#sentence-1", "Answer in German.")
    page.press("#sentence-0 button")
    wait_for(lambda: not any(x.is_displayed() for x in page.all("#sentence-0")))
    unguided, guided = page.run(PROMPT)
    assert unguided != guided
    assert "“Answer in German.”, minus the base" in page.text("#facts")
    assert "from_sentence('Answer in German.'" in page.text("#code")
    assert SENTENCE not in page.text("#code")
    page.press("#sentence-1 button")
    for sentence in map(str, range(MAX_SENTENCES)):
        page.add(sentence)
        wait_for(lambda: [x for x in page.all("[id^=sentence-] textarea") if x.get_attribute("value") == sentence])  # noqa: B023
    page.add("One too many.")
    wait_for(lambda: f"room for {MAX_SENTENCES} sentences" in page.text("body"))
    assert page.errors() == []


def test_a_second_question_replaces_the_first(open_page):
    page = open_page()
    alone = page.run("Describe a rainy Monday.")
    page.ask("Tell me a long story about a train.")
    wait_for(lambda: len(page.answers()[1]) > 15)
    story = page.answers()
    page.ask("Describe a rainy Monday.")
    assert all(not now.startswith(before) for before, now in zip(story, page.answers(), strict=True))
    assert "GenARMLogitsProcessor" not in page.text("#code")
    page.complete()
    assert page.answers() == alone
    assert page.errors() == []


def test_who_waits_sees_a_place_in_the_queue_and_can_leave_it(open_page):
    pages = [open_page(), open_page()]
    pages[1].run(PROMPT)
    for page in pages:
        page.write("#tokens", "256")
        page.ask("Tell me a long story about a train.")
    wait_for(lambda: len(pages[0].answers()[1]) > 15)
    wait_for(lambda: "queue: 1/1" in pages[1].text("#asked, #answers"))
    assert pages[1].answers() == ["", ""]
    pages[1].press("#stop")
    wait_for(lambda: "queue:" not in pages[1].text("#answers"))
    pages[0].complete()
    assert pages[1].answers() == ["", ""]


def test_another_adapter(open_page, folder, tmp_path):
    page = open_page()
    folder = shutil.copytree(folder / "arm-1", tmp_path / "my-arm")
    page.write("#own", str(folder))
    page.press("#load")
    wait_for(lambda: "my-arm" in page.text("#about"))
    wait_for(lambda: page.all("#strength-own input[type=range]"))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    page.write("#own", f"{folder}/")
    page.press("#load")
    wait_for(lambda: "Pickled weights" in page.text("body"))


@pytest.mark.parametrize(("size", "theme"), [*itertools.product(SIZES, ["light", "dark"])])
def test_nothing_overlaps(open_page, size, theme):
    page = open_page(size, theme)
    page.run(PROMPT, 1)
    page.press("#picture .genarm-texts > div:nth-child(2) .genarm-token[tabindex]:nth-child(4)")
    SCREENSHOTS.mkdir(exist_ok=True)
    page.picture(SCREENSHOTS / f"unfolded-{size}-{theme}.png")
    boxes = {}
    for selector in ALONE:
        for element in page.all(selector)[:1]:
            if element.is_displayed():
                boxes[selector] = element.rect
    assert len(boxes) == len(ALONE)
    for (one, a), (other, b) in itertools.combinations(boxes.items(), 2):
        apart = (
            a["x"] + a["width"] <= b["x"] + 1
            or b["x"] + b["width"] <= a["x"] + 1
            or a["y"] + a["height"] <= b["y"] + 1
            or b["y"] + b["height"] <= a["y"] + 1
        )
        assert apart, (one, other)
    (note,) = [x for x in page.all(".genarm-note") if x.is_displayed()]
    bottom, chart = note.rect["y"] + note.rect["height"], page.all("#picture svg")[0].rect
    assert bottom <= chart["y"]
    width = page.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert width[0] <= width[1]
    for slider in ("#sentence-strength-0", *(f"#strength-{index}" for index in range(3))):
        rect = page.all(f"{slider} input[type=range]")[0].rect
        assert rect["width"] > 80
        assert rect["x"] >= 0
        assert rect["x"] + rect["width"] <= SIZES[size][0]
        assert rect["y"] < boxes["#unguided"]["y"] or size == "wide"
    assert page.errors() == []


@pytest.mark.parametrize(("size", "theme"), [*itertools.product(SIZES, ["light", "dark"])])
def test_the_pictures_of_the_readme(open_page, size, theme):
    """`make pictures` copies them to `docs/images`."""
    page = open_page(size, theme, False, of="real_address")
    page.ask(PROMPT)
    wait_for(lambda: "minus the base" in page.text("#facts"), 600)
    page.press("#picture .genarm-texts > div:nth-child(2) .genarm-token[tabindex]:nth-child(5)")
    SCREENSHOTS.mkdir(exist_ok=True)
    page.picture(SCREENSHOTS / f"playground-{size}-{theme}.png")


def test_an_exported_space_answers(tmp_path):
    """Where nothing of the repository is but the package."""
    space = tmp_path / "space"
    command = ["-m", "hf_genarm.cli", "demo", "--arm", "model_cards/arm-smollm2-135m-sentiment", "--export", str(space)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    demo.demo_model()
    with serving(["app.py"], space, tmp_path / "log") as address:
        page = Page(address, tmp_path / "profile")
        try:
            page.write("#own", str(ROOT / "model_cards" / "arm-smollm2-135m-brevity"))
            page.press("#load")
            wait_for(lambda: "folders of the machine" in page.text("body"))
            unguided, guided = page.run(PROMPT, 1)
            assert unguided != guided
            assert "adapters/arm-smollm2-135m-sentiment" in page.text("#code")
        finally:
            page.driver.quit()
