{{- define "holdoff.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- /* At most 50 characters, so that suffixes fit into the 63 of a name. */}}
{{- define "holdoff.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) }}
{{- default $full .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "holdoff.selector" -}}
app.kubernetes.io/name: {{ include "holdoff.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: coordinator
{{- end }}

{{- define "holdoff.labels" -}}
app.kubernetes.io/name: {{ include "holdoff.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "holdoff.image" -}}
{{- $image := .Values.image -}}
{{ $image.repository }}{{ with $image.digest }}@{{ . }}{{ else }}:{{ default .Chart.AppVersion $image.tag }}{{ end }}
{{- end }}

{{- define "holdoff.serviceAccount" -}}
{{- $account := .Values.serviceAccount -}}
{{- default (ternary (include "holdoff.fullname" .) "default" $account.create) $account.name }}
{{- end }}

{{- /* The Secret with the server's certificate; empty without TLS. */}}
{{- define "holdoff.tlsSecret" -}}
{{- if .Values.tls.secretName }}{{ .Values.tls.secretName }}
{{- else if .Values.tls.certManager.enabled }}{{ include "holdoff.fullname" . }}-tls
{{- end }}
{{- end }}

{{- /* How long other pods and balancers take to learn that this one is leaving. */}}
{{- define "holdoff.preStopSeconds" -}}
{{ ternary 0 5 (eq .Values.store.mode "embedded") }}
{{- end }}

{{- define "holdoff.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "holdoff.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- /* Refuses what cannot work; NOTES.txt warns about what is unsafe. */}}
{{- define "holdoff.check" -}}
{{- $store := .Values.store }}
{{- if eq $store.mode "embedded" }}
{{- if or (gt (int .Values.replicaCount) 1) .Values.autoscaling.enabled }}
{{- fail "store.mode embedded keeps the state on the volume of one pod: leave replicaCount at 1 and autoscaling off, or set store.mode to external, sentinel or cluster" }}
{{- end }}
{{- else if regexMatch "://[^/@]*:[^/@]*@" (get $store $store.mode).url }}
{{- fail (printf "store.%s.url holds a password, which would show in the pod's arguments: put the password in a Secret and name it in store.passwordSecret, or the whole URL in store.urlSecret" $store.mode) }}
{{- end }}
{{- if and .Values.tls.secretName .Values.tls.certManager.enabled }}
{{- fail "tls.secretName and tls.certManager.enabled both name the certificate: set one of them" }}
{{- end }}
{{- if and .Values.tls.certManager.enabled (not .Values.tls.certManager.issuerRef.name) }}
{{- fail "tls.certManager.enabled needs tls.certManager.issuerRef.name, the issuer that signs the certificate" }}
{{- end }}
{{- if and .Values.tls.clientCA.secretName (not (include "holdoff.tlsSecret" .)) }}
{{- fail "tls.clientCA is for mutual TLS: set tls.secretName or tls.certManager.enabled too" }}
{{- end }}
{{- if and .Values.access.grants (not (include "holdoff.tlsSecret" .)) }}
{{- fail "access.grants needs credentials, which clients send only over TLS: set tls.secretName or tls.certManager.enabled too" }}
{{- end }}
{{- if and .Values.autoscaling.enabled (lt (int .Values.autoscaling.maxReplicas) (int .Values.autoscaling.minReplicas)) }}
{{- fail "autoscaling.maxReplicas is less than autoscaling.minReplicas" }}
{{- end }}
{{- if and .Values.grpcRoute.enabled (not .Values.grpcRoute.parentRefs) }}
{{- fail "grpcRoute.enabled needs grpcRoute.parentRefs, the Gateway that the route belongs to" }}
{{- end }}
{{- end }}

{{- /* Not empty when callers have to say who they are. */}}
{{- define "holdoff.asksWhoCalls" -}}
{{- if or .Values.access.grants .Values.tls.clientCA.secretName }}yes{{ end }}
{{- end }}

{{- define "holdoff.storeArgs" -}}
{{- $store := .Values.store -}}
{{- if eq $store.mode "embedded" -}}
- --data-dir=/var/lib/holdoff/data
{{- else }}
{{- if $store.urlSecret.name }}
- --redis-url-file=/etc/holdoff/store-url/{{ $store.urlSecret.key }}
{{- else }}
- --redis-url={{ (get $store $store.mode).url }}
{{- end }}
{{- if $store.passwordSecret.name }}
- --redis-password-file=/etc/holdoff/store-password/{{ $store.passwordSecret.key }}
{{- end }}
{{- if and (eq $store.mode "sentinel") $store.sentinel.passwordSecret.name }}
- --redis-sentinel-password-file=/etc/holdoff/sentinel-password/{{ $store.sentinel.passwordSecret.key }}
{{- end }}
{{- if $store.tls.caSecret.name }}
- --redis-ca-file=/etc/holdoff/store-ca/{{ $store.tls.caSecret.key }}
{{- end }}
{{- if $store.tls.certificateSecret }}
- --redis-cert-file=/etc/holdoff/store-certificate/tls.crt
- --redis-key-file=/etc/holdoff/store-certificate/tls.key
{{- end }}
{{- with $store.assume }}
- --assume={{ . }}
{{- end }}
{{- if $store.waitReplicas }}
- --wait-replicas={{ int $store.waitReplicas }}
{{- end }}
{{- if $store.waitFsync }}
- --wait-fsync
{{- end }}
{{- if or $store.waitReplicas $store.waitFsync }}
- --wait-seconds={{ $store.waitSeconds }}
{{- end }}
{{- end }}
{{- end }}

{{- define "holdoff.args" -}}
- serve
- --listen=0.0.0.0:50051
- --health-listen=0.0.0.0:50052
{{- if .Values.metrics.enabled }}
- --metrics-listen=0.0.0.0:9090
{{- end }}
- --log-format={{ .Values.logFormat }}
- --drain-seconds={{ int .Values.drainSeconds }}
{{- range $name, $value := .Values.limits }}
- --limit={{ $name }}={{ int64 $value }}
{{- end }}
- --quarantine-seconds={{ int64 .Values.quarantineSeconds }}
{{ include "holdoff.storeArgs" . }}
{{- if include "holdoff.tlsSecret" . }}
- --tls-cert-file=/etc/holdoff/tls/tls.crt
- --tls-key-file=/etc/holdoff/tls/tls.key
{{- end }}
{{- if .Values.tls.clientCA.secretName }}
- --tls-client-ca-file=/etc/holdoff/client-ca/{{ .Values.tls.clientCA.key }}
- --client-identity={{ .Values.tls.clientIdentity }}
{{- end }}
{{- if .Values.access.grants }}
- --access-file=/etc/holdoff/access/access.toml
{{- end }}
{{- if not (and (include "holdoff.tlsSecret" .) (include "holdoff.asksWhoCalls" .)) }}
- --insecure
{{- end }}
{{- if .Values.policies }}
- --policy-dir=/etc/holdoff/policies
{{- end }}
{{- if .Values.custody.keysSecret }}
- --custody-key-dir=/etc/holdoff/custody-keys
- --custody-spool-dir=/var/lib/holdoff/spool
{{- range .Values.custody.networks }}
- --custody-network={{ . }}
{{- end }}
{{- if .Values.custody.caSecret.name }}
- --custody-ca-file=/etc/holdoff/custody-ca/{{ .Values.custody.caSecret.key }}
{{- end }}
{{- end }}
{{- end }}

{{- /* What is mounted below /etc/holdoff: folder to the Secret or ConfigMap behind it, as JSON. */}}
{{- define "holdoff.mounts" -}}
{{- $store := .Values.store }}
{{- $full := include "holdoff.fullname" . }}
{{- $secrets := dict "tls" (include "holdoff.tlsSecret" .) "client-ca" .Values.tls.clientCA.secretName "custody-keys" .Values.custody.keysSecret }}
{{- if ne $store.mode "embedded" }}
{{- $_ := set $secrets "store-url" $store.urlSecret.name }}
{{- $_ := set $secrets "store-password" $store.passwordSecret.name }}
{{- $_ := set $secrets "store-ca" $store.tls.caSecret.name }}
{{- $_ := set $secrets "store-certificate" $store.tls.certificateSecret }}
{{- end }}
{{- if .Values.custody.keysSecret }}
{{- $_ := set $secrets "custody-ca" .Values.custody.caSecret.name }}
{{- end }}
{{- if eq $store.mode "sentinel" }}
{{- $_ := set $secrets "sentinel-password" $store.sentinel.passwordSecret.name }}
{{- end }}
{{- $maps := dict "policies" (ternary (printf "%s-policies" $full) "" (not (empty .Values.policies))) "access" (ternary (printf "%s-access" $full) "" (not (empty .Values.access.grants))) }}
{{- dict "secrets" $secrets "configMaps" $maps | toJson }}
{{- end }}

{{- define "holdoff.pod" -}}
metadata:
  labels:
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- include "holdoff.selector" . | nindent 4 }}
  annotations:
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    checksum/policies: {{ .Values.policies | toJson | sha256sum }}
spec:
  {{- $mounts := include "holdoff.mounts" . | fromJson }}
  serviceAccountName: {{ include "holdoff.serviceAccount" . }}
  automountServiceAccountToken: false
  # Else Kubernetes puts variables HOLDOFF_… for our own Service into the environment.
  enableServiceLinks: false
  # With custody, a request to a token URL is finished, which takes at most 100 s.
  terminationGracePeriodSeconds: {{ add (int .Values.drainSeconds) (include "holdoff.preStopSeconds" . | int) 10 (ternary 100 0 (not (empty .Values.custody.keysSecret))) }}
  securityContext:
    {{- include "holdoff.podSecurityContext" . | nindent 4 }}
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  containers:
    - name: coordinator
      image: {{ include "holdoff.image" . | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [holdoff-coordinator]
      args:
        {{- include "holdoff.args" . | nindent 8 }}
      ports:
        - name: grpc
          containerPort: 50051
        - name: health
          containerPort: 50052
        {{- if .Values.metrics.enabled }}
        - name: metrics
          containerPort: 9090
        {{- end }}
      startupProbe:
        grpc:
          port: 50052
          service: liveness
        periodSeconds: 2
        failureThreshold: 60
      readinessProbe:
        grpc:
          port: 50052
        periodSeconds: 5
      # A new process would not bring a store back that is away.
      livenessProbe:
        grpc:
          port: 50052
          service: liveness
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
      {{- if ne (include "holdoff.preStopSeconds" . | int) 0 }}
      lifecycle:
        preStop:
          sleep:
            seconds: {{ include "holdoff.preStopSeconds" . }}
      {{- end }}
      securityContext:
        {{- include "holdoff.securityContext" . | nindent 8 }}
      resources:
        {{- toYaml .Values.resources | nindent 8 }}
      volumeMounts:
        - name: tmp
          mountPath: /tmp
        {{- if eq .Values.store.mode "embedded" }}
        - name: data
          mountPath: /var/lib/holdoff
        {{- else if .Values.custody.keysSecret }}
        - name: spool
          mountPath: /var/lib/holdoff
        {{- end }}
        {{- range $kind := list "secrets" "configMaps" }}
        {{- range $folder, $name := get $mounts $kind }}
        {{- if $name }}
        - name: {{ $folder }}
          mountPath: /etc/holdoff/{{ $folder }}
          readOnly: true
        {{- end }}
        {{- end }}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir:
        sizeLimit: 64Mi
    {{- if and .Values.custody.keysSecret (ne .Values.store.mode "embedded") }}
    # It outlives a container; before the pod ends, a drain stores what is in it.
    - name: spool
      emptyDir:
        sizeLimit: 64Mi
    {{- end }}
    {{- range $folder, $name := $mounts.secrets }}
    {{- if $name }}
    - name: {{ $folder }}
      secret:
        secretName: {{ $name }}
        defaultMode: 0440
    {{- end }}
    {{- end }}
    {{- range $folder, $name := $mounts.configMaps }}
    {{- if $name }}
    - name: {{ $folder }}
      configMap:
        name: {{ $name }}
    {{- end }}
    {{- end }}
  {{- if and .Values.topologySpread.enabled (ne .Values.store.mode "embedded") }}
  topologySpreadConstraints:
    {{- range $key := list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
    - maxSkew: 1
      topologyKey: {{ $key }}
      whenUnsatisfiable: {{ $.Values.topologySpread.whenUnsatisfiable }}
      labelSelector:
        matchLabels:
          {{- include "holdoff.selector" $ | nindent 10 }}
      matchLabelKeys: [pod-template-hash]
    {{- end }}
  {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
