{# Shell that several job files share. #}
{% macro define_train(job) -%}
# Every process starts the run, or resumes it if it has been started: also after a restart.
train() {
  if [ -f {{ (job.run ~ "/recipe.toml") | quote }} ]; then
    exec overnight train --resume {{ job.run | quote }}
  else
    exec overnight train {{ job.words | join_words }}
  fi
}
export -f train
{% endmacro %}

{# Whether all steps of the run directory are done and saved. #}
{% macro define_is_finished(run) -%}
is_finished() { overnight runs {{ run }} --json | grep -q '"state": "finished"'; }
{% endmacro %}

{# Follows a torchrun in the background. A signal ends `wait`, not the process that is waited for. #}
{% macro wait_for_torchrun() -%}
running=$!
trap 'kill "$running"' TERM # torchrun signals its processes, which save
while kill -0 "$running" 2>/dev/null; do wait "$running" || true; done
wait "$running" && status=0 || status=$?
# Processes that are stopped on any node save and exit with 0: then the run is not finished.
[ "$status" -ne 0 ] || is_finished || status=1
{% endmacro %}

{% macro require_text(text) -%}
if [ ! -f {{ (text.folder ~ "/manifest.json") | quote }} ]; then
  {% set remedy = ": " ~ (text.prepare | join_words) if text.prepare else "" %}
  echo {{ (text.folder ~ " is not prepared" ~ remedy) | quote }} >&2
  exit 2
fi
{% endmacro %}

{# `is_first` is a shell condition that holds on one node: it prepares the text, the others wait. #}
{% macro prepare_texts(job, is_first) -%}
{% for text in job.local_texts %}
{% set manifest = (text.folder ~ "/manifest.json") | quote %}
{% if text.prepare %}
# The first node prepares the text; the others wait for it.
if {{ is_first }} && [ ! -f {{ manifest }} ]; then
  {{ text.prepare | join_words }}
fi
until [ -f {{ manifest }} ]; do sleep 10; done
{% else %}
{{ require_text(text) -}}
{% endif %}
{% endfor %}
{% endmacro %}
