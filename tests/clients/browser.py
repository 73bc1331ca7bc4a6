"""The server's page in a real browser, without a window."""

import contextlib
import shutil

import pytest


@contextlib.contextmanager
def chromium(width=1200, height=1100, dark=False):
    """A driver of headless Chromium; skips the test, visibly, where it is not installed."""
    webdriver = pytest.importorskip("selenium.webdriver")
    found = [shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")]
    if not all(found):
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    if dark:
        options.add_argument("--force-dark-mode")
    options.add_argument(f"--window-size={width},{height}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(found[1]))
    driver.set_page_load_timeout(30)
    driver.set_script_timeout(30)
    try:
        yield driver
    finally:
        driver.quit()


def wait_for(driver, condition, seconds=20):
    """What `condition(driver)` gives once it is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, seconds, poll_frequency=0.05).until(condition)


def element(driver, id_):
    return driver.find_element("id", id_)


def example_shown(driver):
    """The request that the page has filled in."""
    wait_for(driver, lambda d: element(d, "request").get_property("value"))
    return element(driver, "request").get_property("value")


def predict(driver, text=None):
    """Presses the button, with `text` as the request if given; caption and text of the answer."""
    before = element(driver, "answer-caption").text
    if text is not None:
        driver.execute_script("arguments[0].value = arguments[1]", element(driver, "request"), text)
    driver.execute_script("document.getElementById('answer-caption').textContent = 'asked'")
    element(driver, "predict").click()
    wait_for(driver, lambda d: element(d, "answer-caption").text.startswith("Answer"))
    assert before
    return element(driver, "answer-caption").text, element(driver, "answer").text


def complaints(driver):
    """What the browser has logged: blocked by the policy, exceptions, missing files."""
    return [entry["message"] for entry in driver.get_log("browser")]
