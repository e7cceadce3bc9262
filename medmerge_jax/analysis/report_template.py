"""The page of `report`. A string in a module, so that no package data can get lost."""

TEMPLATE = """\
{% macro table(titles, rows) %}
<table>
<tr>{% for title in titles %}<th>{{ title }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endmacro %}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; }
th, td { padding: 0.25rem 0.8rem; border-bottom: 1px solid #ddd; text-align: left;
         font-variant-numeric: tabular-nums; }
.best { font-weight: bold; }
img { max-width: 100%; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% if facts %}
<table>
{% for name, value in facts %}
<tr><th>{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% if comparison %}
<h2>Test results</h2>
<p>Mean &plusmn; standard deviation over seeds; the best of each column is bold.</p>
<table>
<tr>{% for name in comparison[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in comparison[1] %}
<tr>{% for text, best in row %}<td{% if best %} class="best"{% endif %}>{{ text }}</td>\
{% endfor %}</tr>
{% endfor %}
</table>
{% endif %}
{% if metrics and metrics[1] %}
<h2>Results</h2>
{{ table(*metrics) }}
{% endif %}
{% if stages %}
<h2>Stages</h2>
{{ table(*stages) }}
{% endif %}
{% if parents %}
<h2>Parents</h2>
{{ table(["parent", "origin"], parents) }}
{% endif %}
{% if counts %}
<h2>Data</h2>
{{ table(*counts) }}
{% endif %}
{% if audit %}
<h2>Data audit</h2>
<ul>
{% for line in audit %}
<li>{{ line }}</li>
{% endfor %}
</ul>
{% endif %}
{% if overlaps and overlaps[1] %}
{{ table(*overlaps) }}
{% endif %}
{% for name, image in figures %}
<h2>{{ name | capitalize }}</h2>
<p><img alt="{{ name }}" src="data:image/png;base64,{{ image }}"></p>
{% endfor %}
{% if versions %}
<h2>Versions</h2>
{{ table(["package", "version"], versions.items()) }}
{% endif %}
{% if config %}
<h2>Config</h2>
<details><summary>config.json</summary><pre>{{ config }}</pre></details>
{% endif %}
</body>
</html>
"""
