package connectnode

import (
	"fmt"
	"maps"
	"strings"
	"testing"

	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/etcdtest"
)

func TestNodeOverTLSNeedsAllOfItsFilesAndWhoMayCome(t *testing.T) {
	ca := etcdtest.NewCA(t)
	cert, key := ca.Issue("localhost")
	all := map[string]string{"TRUST_DOMAIN": "test", "NODE_TLS_CERT_FILE": cert, "NODE_TLS_KEY_FILE": key, "NODE_TLS_CLIENT_CA_FILE": ca.File}
	for name, tc := range map[string]struct {
		change map[string]string
		want   string // in the error; empty: none
	}{
		"all":                 {nil, ""},
		"without authority":   {map[string]string{"NODE_TLS_CLIENT_CA_FILE": ""}, "NODE_TLS_CLIENT_CA_FILE"},
		"authority alone":     {map[string]string{"NODE_TLS_CERT_FILE": "", "NODE_TLS_KEY_FILE": ""}, "NODE_TLS_CERT_FILE"},
		"not there":           {map[string]string{"NODE_TLS_KEY_FILE": "/nowhere"}, "NODE_TLS_KEY_FILE"},
		"no trust domain":     {map[string]string{"TRUST_DOMAIN": ""}, "trust_domain is not set"},
		"anybody":             {map[string]string{"NODE_TLS_ALLOWED_SANS": "*"}, "NODE_TLS_ALLOWED_SANS"},
		"by name":             {map[string]string{"TRUST_DOMAIN": "", "NODE_TLS_ALLOWED_SANS": "pm-1,pm-2"}, ""},
		"open to others":      {map[string]string{"LISTEN_ADDRESS": "0.0.0.0"}, "TLS_CERT_FILE"},
		"open, not asked who": {map[string]string{"LISTEN_ADDRESS": "0.0.0.0", "TLS_CERT_FILE": cert, "TLS_KEY_FILE": key}, "without authentication of clients (CLIENT_AUTH_MODE=jwt)"},
		"open, for everybody": {map[string]string{"LISTEN_ADDRESS": "0.0.0.0", "TLS_CERT_FILE": cert, "TLS_KEY_FILE": key, "NODE_TLS_CERT_FILE": "", "NODE_TLS_KEY_FILE": "", "NODE_TLS_CLIENT_CA_FILE": ""}, "NODE_TLS_CLIENT_CA_FILE"},
		"open and allowed":    {map[string]string{"LISTEN_ADDRESS": "0.0.0.0", "ALLOW_INSECURE": "true"}, ""},
		"metrics for others":  {map[string]string{"METRICS_ADDRESS": "0.0.0.0"}, ""},
		"etcd elsewhere":      {map[string]string{"ETCD_ENDPOINTS": "etcd:2379"}, "ETCD_ENDPOINTS"},
		"a page without key":  {map[string]string{"TLS_CERT_FILE": cert}, "TLS_KEY_FILE"},
		"Controller, no CA":   {map[string]string{"CONTROLLER_TLS_CERT_FILE": cert, "CONTROLLER_TLS_KEY_FILE": key}, "CONTROLLER_TLS_CA_FILE"},
		"wrong trust domain":  {map[string]string{"TRUST_DOMAIN": "a/b"}, "TRUST_DOMAIN"},
		"open to clients with tokens": {map[string]string{
			"LISTEN_ADDRESS": "0.0.0.0", "TLS_CERT_FILE": cert, "TLS_KEY_FILE": key, "CLIENT_AUTH_MODE": "jwt", "CLIENT_AUTH_JWT": fmt.Sprintf(issuers, secretFile(t, "s")),
			"ETCD_ENDPOINTS": "127.0.0.1:1",
		}, ""},
	} {
		env := maps.Clone(all)
		maps.Copy(env, tc.change)
		err := cli.Fill(&Config{}, env)
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}
