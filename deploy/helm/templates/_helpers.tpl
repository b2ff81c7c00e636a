{{- define "neuronguard.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* Short enough for "-engine-metrics" and an ordinal within 63 characters. */}}
{{- define "neuronguard.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "neuronguard.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "neuronguard.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What pods are chosen by; never changed, because selectors cannot be. Arguments: root, component. */}}
{{- define "neuronguard.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "neuronguard.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "neuronguard.labels" -}}
{{- $root := index . 0 -}}
{{ include "neuronguard.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: neuronguard
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "neuronguard.image" -}}
{{- $root := index . 0 -}}{{- $image := index . 1 -}}
{{- printf "%s:%s" $image.repository (default $root.Chart.AppVersion $image.tag) -}}
{{- end -}}

{{/* The engines' addresses, one for each engine: a directive is for one engine, so nothing may stand between. */}}
{{- define "neuronguard.engineUrls" -}}
{{- if .Values.engine.enabled -}}
{{- $engine := printf "%s-engine" (include "neuronguard.fullname" .) -}}
{{- $urls := list -}}
{{- range $index := until (int .Values.engine.replicas) -}}
{{- $urls = append $urls (printf "http://%s-%d.%s:8000" $engine $index $engine) -}}
{{- end -}}
{{- join "," $urls -}}
{{- else -}}
{{- join "," .Values.gateway.engineUrls -}}
{{- end -}}
{{- end -}}

{{- define "neuronguard.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
# The group that may read mounted secrets.
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "neuronguard.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{/* A file of a secret, readable by the group alone: a key file that others may read is refused. */}}
{{- define "neuronguard.secretVolume" -}}
secret:
  secretName: {{ .name }}
  defaultMode: 0440
  items: [{key: {{ .key }}, path: {{ .key }}}]
{{- end -}}

{{/* The rules of deploy/prometheus with the names of jobs in this cluster. Arguments: root, text. */}}
{{- define "neuronguard.rules" -}}
{{- $jobs := (index . 0).Values.monitoring.jobs -}}
{{- $text := index . 1 -}}
{{- range $name, $job := $jobs -}}
{{- $text = $text | replace (printf "job=%q" $name) (printf "job=%q" $job) -}}
{{- end -}}
{{- $text = $text | replace `job=~"engine|prometheus|alertmanager"` (printf "job=~\"%s|%s|%s\"" $jobs.engine $jobs.prometheus $jobs.alertmanager) -}}
{{- (fromYaml $text).groups | toYaml -}}
{{- end -}}
