{{- /* Names, labels and decisions that several templates share. */}}

{{- define "lanewise.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "lanewise.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "lanewise.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "lanewise.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- /* Name of what lies outside the release's namespace: releases of one name in two namespaces must not meet. */}}
{{- define "lanewise.scopedName" -}}
{{- printf "%s-%s" (include "lanewise.fullname" .) .Release.Namespace }}
{{- end }}

{{- define "lanewise.routerClusterRole" -}}
{{- default (printf "%s-router" (include "lanewise.scopedName" .)) .Values.rbac.routerClusterRole }}
{{- end }}

{{- define "lanewise.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "lanewise.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- required "serviceAccount.name is required with serviceAccount.create=false" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- /* What pods are selected by; it can never change, and NetworkPolicies of services name it. */}}
{{- define "lanewise.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "lanewise.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: lanewise
{{- end }}

{{- /* repository@digest, else repository:tag. */}}
{{- define "lanewise.image" -}}
{{- if .image.digest }}
{{- printf "%s@%s" .image.repository .image.digest }}
{{- else }}
{{- printf "%s:%s" .image.repository (default .root.Chart.AppVersion .image.tag) }}
{{- end }}
{{- end }}

{{- /* "true" where the Prometheus operator's API is to be used. */}}
{{- define "lanewise.monitoring" -}}
{{- $wanted := toString .Values.monitoring.enabled }}
{{- if eq $wanted "auto" }}
{{- .Capabilities.APIVersions.Has "monitoring.coreos.com/v1" }}
{{- else }}
{{- $wanted }}
{{- end }}
{{- end }}

{{- /* "true" where this release is to install a CRD: wanted, and not the property of another release. */}}
{{- define "lanewise.crd.ours" -}}
{{- if .root.Values.crds.enabled }}
{{- $found := lookup "apiextensions.k8s.io/v1" "CustomResourceDefinition" "" .name }}
{{- $notes := dig "metadata" "annotations" (dict) $found }}
{{- $owner := printf "%s/%s" (get $notes "meta.helm.sh/release-namespace") (get $notes "meta.helm.sh/release-name") }}
{{- or (empty $found) (eq $owner (printf "%s/%s" .root.Release.Namespace .root.Release.Name)) }}
{{- else }}
{{- "false" }}
{{- end }}
{{- end }}

{{- /* The operator's configuration: fields of OperatorConfig in lanewise/config.py. */}}
{{- define "lanewise.config" -}}
namespaces: {{ toJson .Values.watchNamespaces }}
control_image: {{ include "lanewise.image" (dict "root" . "image" .Values.images.control) | quote }}
worker_image: {{ include "lanewise.image" (dict "root" . "image" .Values.images.worker) | quote }}
image_pull_policy: {{ .Values.images.pullPolicy }}
router_cluster_role: {{ include "lanewise.routerClusterRole" . }}
lease_name: {{ include "lanewise.fullname" . }}
lease_namespace: {{ .Release.Namespace }}
http: 0.0.0.0:8080
log_level: {{ .Values.log.level }}
log_format: {{ .Values.log.format }}
{{- end }}
