"""Our figures in Locust's web page: a tab with a table, and a page of charts."""

import json
from typing import Any

from flask import Response, request
from locust.env import Environment

from loadtest import charts
from loadtest.recorder import Recorder

TAB = "sottovoce"
REFRESH_SECONDS = 3
PAGE = """<!doctype html><meta charset="utf-8"><title>Sottovoce: charts</title>
<meta http-equiv="refresh" content="{refresh}">
<style>:root {{ color-scheme: light dark }} body {{ font-family: sans-serif; margin: 2rem }}</style>
<p><a href="{base}/">Locust</a></p>{charts}"""


def add_to_web(environment: Environment, recorder: Recorder) -> None:
    """Locust's documented ways: template arguments, a route, and a look at what it answers."""
    web = environment.web_ui
    if web is None or web.app is None:
        return
    web.template_args["extended_tabs"] = [{"title": "Sottovoce", "key": TAB}]
    web.template_args["extended_tables"] = [
        {
            "key": TAB,
            "structure": [
                {"key": "figure", "title": "Figure"},
                {"key": "value", "title": "Value"},
            ],
        }
    ]
    base = (environment.parsed_options and environment.parsed_options.web_base_path) or ""

    @web.app.route(f"{base}/sottovoce")
    @web.auth_required_if_enabled
    def sottovoce() -> str:
        return PAGE.format(refresh=REFRESH_SECONDS, base=base, charts=drawn(recorder))

    @web.app.after_request
    def with_ours(response: Response) -> Response:
        path = request.path.removeprefix(base)
        if path == "/stats/requests" and response.status_code == 200:
            told: dict[str, Any] = json.loads(response.get_data())
            told["extended_stats"] = [{"key": TAB, "data": _table(recorder)}]
            response.set_data(json.dumps(told))
        elif path == "/stats/report" and response.status_code == 200:
            response.set_data(with_charts(response.get_data(as_text=True), recorder))
        return response


def with_charts(report: str, recorder: Recorder) -> str:
    """Locust's HTML report with our charts below its own."""
    section = (
        '<section style="max-width:900px;margin:2rem auto;font-family:sans-serif">'
        f"<h2>Streams and deliveries</h2>{drawn(recorder)}</section>"
    )
    head, body_end, tail = report.rpartition("</body>")
    return head + section + body_end + tail if body_end else report + section


def drawn(recorder: Recorder) -> str:
    return charts.draw(charts.charts_of(recorder.rows, recorder.figures()), recorder.marks)


def _table(recorder: Recorder) -> list[dict[str, str]]:
    return [
        {"name": name, "figure": name.replace("_", " "), "value": f"{value:,.6g}"}
        for name, value in recorder.figures().items()
    ]
