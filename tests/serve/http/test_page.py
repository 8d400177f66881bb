"""The page at `/` in a real browser: it chats, it shows the engine at work, and it asks nobody but its own server."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from stretto.models.load import Model

from ...report.test_pages import CHROMIUM, DRIVER, FLAGS
from .conftest import Running, running, until


@pytest.fixture(scope="module")
def server(chat_model: Model) -> Iterator[Running]:
    """A server whose model never ends an answer by itself, so that the page has something to show."""
    tokenizer = chat_model.tokenizer
    ends, tokenizer.eos_ids = tokenizer.eos_ids, frozenset()
    with running(chat_model) as found:
        yield found
    tokenizer.eos_ids = ends


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not (CHROMIUM.exists() and DRIVER.exists()):
        pytest.skip("no Chromium with its driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


def text_of(browser: Any, selector: str) -> str:
    return str(browser.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector))


def send(browser: Any, text: str) -> None:
    script = "document.getElementById('text').value = arguments[0]; document.getElementById('form').requestSubmit()"
    browser.execute_script(script, text)


def test_it_asks_nobody_but_its_own_server(server: Running) -> None:
    with server.client() as client:
        reply = client.get("/")
    assert reply.status_code == 200
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    addresses = set(re.findall(r"(?:https?:)?//[\w.]+[^\s\"')]*", reply.text))
    assert addresses <= {"http://www.w3.org/2000/svg"}, addresses


@pytest.mark.browser
def test_it_chats_and_shows_the_engine_at_work(server: Running, browser: Any) -> None:
    server.backend.seconds = 0.02
    browser.get(server.url)
    until(lambda: text_of(browser, "#model") == "tiny")
    browser.execute_script("document.getElementById('most').value = 150")
    send(browser, "<b>abc</b>")
    until(lambda: len(text_of(browser, ".said.assistant span")) > 5)
    until(lambda: text_of(browser, "#running") == "1 / 4")
    assert text_of(browser, "#send") == "Stop"
    until(lambda: "decode" in text_of(browser, "#rows"))
    until(lambda: "tokens/s" in text_of(browser, ".said.assistant .note"), 20)
    assert text_of(browser, ".said.user span") == "<b>abc</b>"
    until(lambda: browser.execute_script("return document.querySelectorAll('#tokens polyline').length") == 1)
    until(lambda: "median" in text_of(browser, "#pass"))
    until(lambda: text_of(browser, "#state") == "idle")
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []


@pytest.mark.browser
def test_stop_frees_the_engine(server: Running, browser: Any) -> None:
    server.backend.seconds = 0.05
    browser.get(server.url)
    browser.execute_script("document.getElementById('most').value = 200")
    send(browser, "abc")
    until(lambda: len(text_of(browser, ".said.assistant span")) > 2)
    assert not server.idle()
    browser.execute_script("document.getElementById('send').click()")
    assert until(server.idle) < 2.0
    until(lambda: text_of(browser, "#send") == "Send")


@pytest.mark.browser
def test_it_asks_for_a_key_where_one_is_needed(chat_model: Model, browser: Any) -> None:
    with running(chat_model, api_keys=("secret",)) as server:
        browser.get(server.url)
        until(lambda: "API key" in text_of(browser, "#state"))
        assert not browser.execute_script("return document.getElementById('keyed').hidden")
        browser.execute_script("document.getElementById('key').value = 'secret'")
        until(lambda: text_of(browser, "#model") == "tiny")
        browser.execute_script("sessionStorage.clear()")
        browser.get("about:blank")
        time.sleep(0.1)
