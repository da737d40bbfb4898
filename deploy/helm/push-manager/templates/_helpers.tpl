{{- /*
Helpers of all templates. "c" below is the context of one program: a dict of root ($), component (push-manager, connect-node or
controller) and values (its part of the values).
*/}}

{{- /* The name of the release. 38 characters leave room for what Kubernetes puts behind the name of a pod. */}}
{{- define "push-manager.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if .Values.fullnameOverride }}
{{- $name = .Values.fullnameOverride }}
{{- else if not (contains $name .Release.Name) }}
{{- $name = printf "%s-%s" .Release.Name $name }}
{{- else }}
{{- $name = .Release.Name }}
{{- end }}
{{- $name | trunc 38 | trimSuffix "-" }}
{{- end }}

{{- /* The name of a program's objects. Takes c. */}}
{{- define "push-manager.name" -}}
{{- $name := include "push-manager.fullname" .root }}
{{- if ne .component "push-manager" }}{{ $name = printf "%s-%s" $name .component }}{{ end }}
{{- $name }}
{{- end }}

{{- define "push-manager.selectorLabels" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "push-manager.labels" -}}
{{ include "push-manager.selectorLabels" . }}
app.kubernetes.io/part-of: push-manager
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* The image of a program: its own tag or digest, or that of all. Takes c. */}}
{{- define "push-manager.image" -}}
{{- $image := .root.Values.image }}
{{- if or .values.image.tag .values.image.digest }}{{ $image = .values.image }}{{ end }}
{{- .root.Values.image.repository }}{{ if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default .root.Chart.AppVersion }}{{ end }}
{{- end }}

{{- /* Ports of the programs: their own defaults. */}}
{{- define "push-manager.ports" -}}
push-manager: {grpc: 50053, http: 8053, metrics: 9093}
connect-node: {grpc: 50052, http: 8080, metrics: 9094}
controller: {grpc: 50051, metrics: 9095}
{{- end }}

{{- /* The address of the Controller. The name of a headless Service leads to all of them. */}}
{{- define "push-manager.controllerAddress" -}}
{{- $name := include "push-manager.name" (dict "root" . "component" "controller") }}
{{- if not .Values.controller.enabled }}{{ .Values.controller.address }}
{{- else if eq .Values.controller.store "redis" }}dns:///{{ $name }}-headless:50051
{{- else }}{{ $name }}:{{ .Values.controller.service.port }}
{{- end }}
{{- end }}

{{- /* The Secret of a program's certificate. Takes c. */}}
{{- define "push-manager.tlsSecret" -}}
{{- $tls := .values.tls }}
{{- $tls.existingSecret | default (printf "%s-tls" (include "push-manager.name" .)) }}
{{- end }}

{{- /* The path of a program in the trust domain. A Secret is shared by all pods of a program, so it names the program and no pod. Takes c. */}}
{{- define "push-manager.identity" -}}
{{- if eq .component "connect-node" }}ns/{{ .root.Release.Namespace }}/sa/{{ include "push-manager.name" . }}
{{- else }}{{ .component }}/{{ include "push-manager.name" . }}
{{- end }}
{{- end }}

{{- /* What all programs are told alike, as keys of docs/settings.md. */}}
{{- define "push-manager.commonConfig" -}}
listen_address: {{ .Values.listenAddress | quote }}
log_format: json
drain_timeout: 20s
{{- if .Values.allowInsecure }}
allow_insecure: true
{{- end }}
{{- with .Values.tls.trustDomain }}
trust_domain: {{ . }}
{{- end }}
etcd:
  endpoints: {{ join "," .Values.etcd.endpoints | quote }}
  {{- with .Values.etcd.auth.username }}
  username: {{ . | quote }}
  password_file: /etc/push-manager/etcd-auth/{{ $.Values.etcd.auth.passwordKey }}
  {{- end }}
  {{- if .Values.etcd.tls.existingSecret }}
  tls:
    ca_file: /etc/push-manager/etcd-tls/ca.crt
    {{- if .Values.etcd.tls.clientCertificate }}
    cert_file: /etc/push-manager/etcd-tls/tls.crt
    key_file: /etc/push-manager/etcd-tls/tls.key
    {{- end }}
  {{- end }}
{{- end }}

{{- /* The files of a program's own certificate. */}}
{{- define "push-manager.ownFiles" -}}
cert_file: /etc/push-manager/tls/tls.crt
key_file: /etc/push-manager/tls/tls.key
{{- end }}

{{- /* Nested keys as the variables of the environment that they have. Takes config and prefix. */}}
{{- define "push-manager.variables" -}}
{{- range $key, $value := .config }}
{{- $name := printf "%s%s" $.prefix (upper $key) }}
{{- if kindIs "map" $value }}
{{- include "push-manager.variables" (dict "prefix" (printf "%s_" $name) "config" $value) }}
{{- else if and (kindIs "slice" $value) (not (kindIs "map" (first $value))) }}
- name: {{ $name }}
  value: {{ join "," $value | quote }}
{{- else if not (kindIs "invalid" $value) }}
- name: {{ $name }}
  value: {{ ternary $value (toJson $value) (kindIs "string" $value) | quote }}
{{- end }}
{{- end }}
{{- end }}

{{- /*
The template of a program's pods. Takes c and: args, env (a list in YAML), ready (the path of the readiness probe), volumes (names of
volumes to Secrets and ConfigMaps), spread (keys of labels that tell one revision of pods from the next).
*/}}
{{- define "push-manager.pod" -}}
{{- $v := .values }}
{{- $g := .root.Values }}
{{- $name := include "push-manager.name" . }}
{{- $ports := get (include "push-manager.ports" .root | fromYaml) .component }}
metadata:
  labels: # not the chart's version, which would restart all pods
    {{- include "push-manager.selectorLabels" . | nindent 4 }}
    {{- with $g.commonLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- with $v.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- if or $v.podAnnotations .checksum }}
  annotations:
    {{- with .checksum }}
    checksum/config: {{ . }}
    {{- end }}
    {{- with $v.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
spec:
  {{- if $g.serviceAccount.create }}
  serviceAccountName: {{ $name }}
  {{- end }}
  automountServiceAccountToken: false
  enableServiceLinks: false # a Service named "grpc" would set GRPC_PORT
  securityContext:
    {{- toYaml $g.podSecurityContext | nindent 4 }}
  {{- with $g.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $v.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  terminationGracePeriodSeconds: {{ $v.terminationGracePeriodSeconds }}
  containers:
    - name: {{ .component }}
      image: {{ include "push-manager.image" . | quote }}
      imagePullPolicy: {{ $g.image.pullPolicy }}
      args: {{ toJson .args }}
      env:
        {{- .env | trim | nindent 8 }}
        {{- with $v.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with $v.extraEnvFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        {{- range $port, $number := $ports }}
        - name: {{ $port }}
          containerPort: {{ $number }}
        {{- end }}
      startupProbe:
        httpGet: {path: /healthz, port: metrics}
        periodSeconds: 2
        failureThreshold: 30
      livenessProbe:
        httpGet: {path: /healthz, port: metrics}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 3
      readinessProbe:
        httpGet: {path: {{ .ready | quote }}, port: metrics}
        periodSeconds: 2
        timeoutSeconds: 2
        failureThreshold: 2
      resources:
        {{- toYaml $v.resources | nindent 8 }}
      securityContext:
        {{- toYaml $g.securityContext | nindent 8 }}
      {{- $mounts := list }}
      {{- range $volume, $source := .volumes }}
      {{- $mounts = append $mounts (dict "name" $volume "mountPath" (printf "/etc/push-manager/%s" $volume) "readOnly" true) }}
      {{- end }}
      {{- with concat $mounts $v.extraVolumeMounts }}
      volumeMounts:
        {{- toYaml . | nindent 8 }}
      {{- end }}
  {{- $volumes := list }}
  {{- range $volume, $source := .volumes }}
  {{- $volumes = append $volumes (merge (dict "name" $volume) $source) }}
  {{- end }}
  {{- with concat $volumes $v.extraVolumes }}
  volumes:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $v.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $v.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $v.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  topologySpreadConstraints:
    {{- if $v.topologySpreadConstraints }}
    {{- toYaml $v.topologySpreadConstraints | nindent 4 }}
    {{- else }}
    {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
    - maxSkew: 1
      topologyKey: {{ . }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "push-manager.selectorLabels" $ | nindent 10 }}
      {{- with $.revision }}
      matchLabelKeys: [{{ . }}]
      {{- end }}
    {{- end }}
    {{- end }}
{{- end }}

{{- /* The volumes of a program. Its files are for its group alone: 0440. Takes c. */}}
{{- define "push-manager.volumes" -}}
{{- $g := .root.Values }}
{{- if eq .component "push-manager" }}
config: {configMap: {name: {{ include "push-manager.name" . }}}}
{{- end }}
{{- if $g.tls.enabled }}
tls: {secret: {secretName: {{ include "push-manager.tlsSecret" . }}, defaultMode: 0440}}
{{- end }}
{{- if and $g.tls.enabled (eq .component "connect-node") }}
{{- with .values.clientTls.existingSecret }}
client-tls: {secret: {secretName: {{ . }}, defaultMode: 0440}}
{{- end }}
{{- end }}
{{- with $g.etcd.tls.existingSecret }}
etcd-tls: {secret: {secretName: {{ . }}, defaultMode: 0440}}
{{- end }}
{{- if $g.etcd.auth.username }}
etcd-auth: {secret: {secretName: {{ $g.etcd.auth.existingSecret }}, defaultMode: 0440}}
{{- end }}
{{- if and (eq .component "controller") (eq .values.store "redis") }}
redis: {secret: {secretName: {{ .values.redis.existingSecret }}, defaultMode: 0440}}
{{- end }}
{{- with .values.existingSecret }}
secrets: {secret: {secretName: {{ . }}, defaultMode: 0440}}
{{- end }}
{{- end }}

{{- /* A headless Service and one with an address. Takes c. Prometheus finds the pods by the headless one. */}}
{{- define "push-manager.services" -}}
{{- $name := include "push-manager.name" . }}
{{- $ports := get (include "push-manager.ports" .root | fromYaml) .component }}
apiVersion: v1
kind: Service
metadata:
  name: {{ $name }}
  labels:
    {{- include "push-manager.labels" . | nindent 4 }}
  {{- with .values.service.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  type: {{ .values.service.type | default "ClusterIP" }}
  selector:
    {{- include "push-manager.selectorLabels" . | nindent 4 }}
  ports:
    - name: {{ ternary "http" "grpc" (eq .component "connect-node") }}
      port: {{ .values.service.port }}
      targetPort: {{ ternary "http" "grpc" (eq .component "connect-node") }}
    {{- with .values.service.httpPort }}
    - name: http
      port: {{ . }}
      targetPort: http
    {{- end }}
---
apiVersion: v1
kind: Service
metadata:
  name: {{ $name }}-headless
  labels:
    {{- include "push-manager.labels" . | nindent 4 }}
spec:
  clusterIP: None
  selector:
    {{- include "push-manager.selectorLabels" . | nindent 4 }}
  ports:
    {{- range $port, $number := $ports }}
    - name: {{ $port }}
      port: {{ $number }}
      targetPort: {{ $port }}
    {{- end }}
{{- end }}

{{- /* What stands beside the pods of a program. Takes c and replicas. */}}
{{- define "push-manager.beside" -}}
{{- $name := include "push-manager.name" . }}
{{ include "push-manager.services" . }}
{{- if .root.Values.serviceAccount.create }}
---
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {{ $name }}
  labels:
    {{- include "push-manager.labels" . | nindent 4 }}
  {{- with .root.Values.serviceAccount.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
automountServiceAccountToken: false
{{- end }}
{{- if and .values.podDisruptionBudget.enabled (gt (int .replicas) 1) }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ $name }}
  labels:
    {{- include "push-manager.labels" . | nindent 4 }}
spec:
  maxUnavailable: {{ .values.podDisruptionBudget.maxUnavailable }}
  # A pod that is not ready must not keep its node from being drained.
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "push-manager.selectorLabels" . | nindent 6 }}
{{- end }}
{{- end }}
