"""The demos' pages as a user meets them: the real scripts on tiny real models, asked through a real browser.

Needs chromium, chromedriver, selenium and gradio; skips where one is missing, unless ACCESSORY_REQUIRE_BROWSER is set.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import accessory
from accessory.config import PromptType
from accessory.data.prompts import dialog_prompt, format_prompt
from accessory.generation import generate

DEMOS = Path(__file__).resolve().parents[2] / "demos"
TOKENS, POSITIONS = 24, 300  # of an answer; of the chat's model
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
CHROMIUM = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1300,1000"]
STOP_TEXT = "\n###"


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in programs.items() if path is None]
    missing += [name for name in ("selenium", "gradio") if importlib.util.find_spec(name) is None]
    if missing:
        (pytest.fail if os.environ.get("ACCESSORY_REQUIRE_BROWSER") else pytest.skip)(f"no {', '.join(missing)}")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    for argument in (*CHROMIUM, OFFLINE, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs["chromedriver"]))
    yield driver
    driver.quit()


@dataclass
class Page:
    """A demo's page in the browser, in the words of its labels."""

    driver: Any
    address: str

    def open(self) -> "Page":
        self.driver.get(self.address)
        self.wait(lambda: self.elements("//button"))
        return self

    def wait(self, condition: Callable[[], Any]) -> Any:
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        ignored = [StaleElementReferenceException]  # the page draws itself anew while it is looked at
        waiting = WebDriverWait(self.driver, 20, poll_frequency=0.05, ignored_exceptions=ignored)
        return waiting.until(lambda _: condition())

    def elements(self, xpath: str) -> list[Any]:
        return [element for element in self.driver.find_elements("xpath", xpath) if element.is_displayed()]

    def box(self, label: str) -> Any:
        return self.wait(lambda: self.elements(f"//label[.//span[normalize-space()='{label}']]//textarea"))[0]

    def text(self, label: str) -> str:
        return self.box(label).get_property("value")

    def press(self, button: str) -> None:
        self.elements(f"//button[normalize-space()='{button}']")[0].click()

    def upload(self, path: Path) -> None:
        self.driver.find_element("css selector", "input[type=file]").send_keys(str(path))
        self.wait(lambda: self.elements(f"//img[contains(@src, '{path.name}')]"))

    def set_length(self, tokens: int) -> None:
        number = self.elements("//input[@type='number']")[0]
        self.driver.execute_script("arguments[0].select()", number)
        number.send_keys(str(tokens))

    def messages(self) -> list[str]:
        """The conversation, question and answer in turn."""
        spoken = self.driver.find_elements("css selector", "[data-testid=user], [data-testid=bot]")
        return [element.find_element("css selector", ".md").get_property("textContent") for element in spoken]

    def toast(self) -> str:
        toasts = "//*[contains(@class, 'toast-message-text')]"
        # Before it is visible, a toast is there without a text.
        return self.wait(lambda: [text for toast in self.elements(toasts) if (text := toast.text)])[-1]

    def record(self, label: str) -> None:
        """Note every text of a box from now on."""
        script = "window.seen = []; setInterval(() => window.seen.at(-1) === arguments[0].value || "
        self.driver.execute_script(script + "window.seen.push(arguments[0].value), 1)", self.box(label))


@pytest.fixture(scope="module")
def serve(tmp_path_factory, browser):
    """Start a demo as a process; its page."""
    running = []

    def start(script: str, folder: Path, *words: str) -> Page:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        log = tmp_path_factory.mktemp("server") / "log.txt"
        settings = {"GRADIO_TEMP_DIR": str(log.parent / "uploads"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, DEMOS / script, "--pretrained_path", folder, "--device", "cpu", "--dtype", "fp32"]
        with log.open("w") as out:
            server = subprocess.Popen(
                [*command, "--port", str(port), "--max_gen_len", str(TOKENS), *words],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | settings,
            )
        running.append(server)
        deadline = time.monotonic() + 60
        while "Running on" not in log.read_text():
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        return Page(browser, f"http://127.0.0.1:{port}/")

    yield start
    for server in running:
        server.terminate()
    for server in running:
        server.wait(10)


@pytest.fixture(scope="module")
def single_turn(serve, meta_folder) -> Page:
    return serve("single_turn.py", meta_folder)


@pytest.fixture(scope="module")
def single_turn_mm(serve, qformer_folder) -> Page:
    return serve("single_turn_mm.py", qformer_folder)


@pytest.fixture(scope="module")
def multi_turn(serve, qformer_folder) -> Page:
    return serve("multi_turn.py", qformer_folder, "--max_seq_len", str(POSITIONS))


@pytest.fixture(scope="module")
def image_model(qformer_folder):
    return accessory.load_model(str(qformer_folder))


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "red.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return path


def alpaca(question: str, context: str = "") -> str:
    return format_prompt({"instruction": question, "input": context}, PromptType.alpaca)


def answer(model, spoken: list[str], image: Path | None = None, length: int = TOKENS) -> str:
    """To a conversation whose last message is a question."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(spoken)]
    return generate(model, [dialog_prompt(messages)], length, 0.0, 1.0, STOP_TEXT, [image])[0]


# --- single turn -----------------------------------------------------------------------------------------------------


def test_question_is_answered_word_by_word(single_turn, meta_folder):
    model, page = accessory.load_model(str(meta_folder)), single_turn.open()
    length = 400  # on a busy machine a page shows several words at once
    page.set_length(length)
    page.record("Answer")
    page.box("Question").send_keys("Wrap it")
    page.box("Input (optional)").send_keys("the lines")
    page.press("Run")
    expected = generate(model, [alpaca("Wrap it", "the lines")], length, 0.0, 1.0)[0]
    page.wait(lambda: page.text("Answer") == expected)
    grown = [text for text in page.driver.execute_script("return window.seen") if text]
    assert len(grown) > 2 and all(expected.startswith(text) for text in grown)


def test_stop_ends_an_answer(single_turn, meta_folder):
    page, length = single_turn.open(), 1500
    page.set_length(length)
    page.box("Question").send_keys("Wrap the text")
    page.press("Run")
    page.wait(lambda: page.text("Answer"))
    page.press("Stop")
    before = None
    while before != (before := page.text("Answer")):
        time.sleep(0.3)
    whole = generate(accessory.load_model(str(meta_folder)), [alpaca("Wrap the text")], length, 0.0, 1.0)[0]
    assert whole.startswith(before) and len(before) < len(whole)


def test_empty_question_is_a_toast_and_the_page_goes_on(single_turn, meta_folder):
    page = single_turn.open()
    page.press("Run")
    assert page.toast() == "There is no question yet."
    page.box("Question").send_keys("Wrap")
    page.press("Run")
    page.wait(lambda: page.text("Answer"))


def test_no_image_is_asked_for_by_a_language_only_model(single_turn):
    assert not single_turn.open().driver.find_elements("css selector", "input[type=file]")


def test_uploaded_image_is_asked_about(single_turn_mm, image_model, picture):
    page = single_turn_mm.open()
    expected = {image: generate(image_model, [alpaca("What is it?")], TOKENS, 0.0, 1.0, images=[image])[0]
                for image in (None, picture)}  # fmt: skip
    assert expected[None] != expected[picture]
    page.box("Question").send_keys("What is it?")
    page.press("Run")
    page.wait(lambda: page.text("Answer") == expected[None])
    page.upload(picture)
    page.press("Run")
    page.wait(lambda: page.text("Answer") == expected[picture])


# --- chat ------------------------------------------------------------------------------------------------------------


def say(page: Page, text: str, expected: list[str]) -> None:
    page.box("Message").send_keys(text + "\n")
    page.wait(lambda: page.messages() == expected)


def test_chat_with_a_new_image_undo_and_clear(multi_turn, image_model, picture):
    page = multi_turn.open()
    blind = ["What is it?", answer(image_model, ["What is it?"])]
    say(page, "What is it?", blind)
    page.upload(picture)
    page.wait(lambda: page.messages() == [])  # a new image, a new conversation
    first = ["What is it?", answer(image_model, ["What is it?"], picture)]
    assert first != blind
    say(page, "What is it?", first)
    both = [*first, "And now?", answer(image_model, [*first, "And now?"], picture)]
    say(page, "And now?", both)
    page.press("Undo")
    page.wait(lambda: page.messages() == first)
    assert page.text("Message") == "And now?"
    page.press("Send")
    page.wait(lambda: page.messages() == both)
    page.press("Clear")
    page.wait(lambda: page.messages() == [] and not page.elements("//img[contains(@src, 'red.png')]"))
    say(page, "What is it?", blind)


def test_what_is_typed_during_an_answer_stays(multi_turn, image_model):
    page, length = multi_turn.open(), 100
    page.set_length(length)
    page.box("Message").send_keys("Hello\n")
    page.wait(lambda: len(page.messages()) == 2)
    page.box("Message").send_keys("And")
    whole = ["Hello", answer(image_model, ["Hello"], length=length)]
    page.wait(lambda: page.messages() == whole)
    assert page.text("Message") == "And"


def test_mistakes_are_toasts_and_leave_the_conversation(multi_turn, image_model, tmp_path):
    page = multi_turn.open()
    page.press("Undo")
    assert page.toast() == "There is nothing to undo."
    page.open().press("Send")
    assert page.toast() == "There is no message yet."
    first = ["Hello", answer(image_model, ["Hello"])]
    say(page.open(), "Hello", first)
    too_long = "wrap the lines " * 60
    page.box("Message").send_keys(too_long + "\n")
    assert f"exceed the model's {POSITIONS} positions" in page.toast()
    page.wait(lambda: page.text("Message") == too_long and page.messages() == first)


def test_unreadable_image_is_a_toast_with_its_name(multi_turn, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page = multi_turn.open()
    page.upload(tmp_path / "broken.png")
    page.box("Message").send_keys("What is it?\n")
    assert page.toast() == "broken.png: not an image"
    page.wait(lambda: page.text("Message") == "What is it?" and page.messages() == [])


def test_turns_that_no_longer_fit_are_named(multi_turn, image_model):
    page, long = multi_turn.open(), "wrap the lines " * 15
    first = ["Hello", answer(image_model, ["Hello"])]
    say(page, "Hello", first)
    say(page, long, [*first, long, answer(image_model, [long])])
    note = f"The oldest turn is no longer sent to the model: the conversation outgrew its {POSITIONS} positions."
    assert page.elements(f'//p[normalize-space()="{note}"]')
    page.press("Clear")
    page.wait(lambda: not page.elements(f'//p[normalize-space()="{note}"]'))


# --- what a page opens -----------------------------------------------------------------------------------------------


def fetch(address: str, body: dict | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=20).read().decode()


@pytest.mark.parametrize("path", [DEMOS.parent / "setup.cfg", Path("/etc/hostname")])
def test_no_file_of_the_machine_is_served(single_turn_mm, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        fetch(f"{single_turn_mm.address}gradio_api/file={path}")
    assert refused.value.code == 403


def test_no_file_of_the_machine_is_taken_for_an_upload(single_turn_mm, tmp_path, picture):
    api = f"{single_turn_mm.address}gradio_api/call/respond"
    image = {"path": str(picture), "meta": {"_type": "gradio.FileData"}}
    call = json.loads(fetch(api, {"data": ["What?", "", "alpaca", 4, 0, 1, image]}))
    assert "event: error" in fetch(f"{api}/{call['event_id']}")
    call = json.loads(fetch(api, {"data": ["What?", "", "alpaca", 4, 0, 1, None]}))
    assert "event: complete" in fetch(f"{api}/{call['event_id']}")
