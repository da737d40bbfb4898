{{- /* The configuration file of Push-Manager: what the chart sets, and config on top of it. */}}
{{- define "push-manager.managerConfig" -}}
{{- $config := include "push-manager.commonConfig" . | fromYaml }}
{{- $_ := set $config "controller_address" (include "push-manager.controllerAddress" .) }}
{{- /* Endpoints of a Service go away at the same time as SIGTERM comes: kube-proxy and DNS need some seconds. */}}
{{- $_ = set $config "drain_notice" "5s" }}
{{- /* A client asks DNS again only when a connection ends. */}}
{{- $_ = set $config "api" (dict "connection_age" "10m") }}
{{- if .Values.tls.enabled }}
{{- $files := include "push-manager.ownFiles" . | fromYaml }}
{{- $ca := "/etc/push-manager/tls/ca.crt" }}
{{- $_ = set $config "tls" (merge (dict "client_ca_file" $ca) $files) }}
{{- $node := include "push-manager.identity" (dict "root" . "component" "connect-node") }}
{{- $link := merge (dict "ca_file" $ca) $files }}
{{- if .Values.connectNode.enabled }}
{{- $link = merge (dict "identity" "role" "allowed_sans" $node) $link }}
{{- end }}
{{- $_ = set $config "link" (dict "tls" $link) }}
{{- $_ = set $config "controller" (dict "tls" (merge (dict "ca_file" $ca) $files)) }}
{{- end }}
{{- mergeOverwrite $config (deepCopy .Values.config) | toYaml }}
{{- end }}
