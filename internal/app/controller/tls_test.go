package controller

import (
	"maps"
	"strings"
	"testing"

	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/etcdtest"
)

func TestControllerThatOthersReachNeedsTLSAndWhoMayAsk(t *testing.T) {
	ca := etcdtest.NewCA(t)
	cert, key := ca.Issue("localhost")
	all := map[string]string{"LISTEN_ADDRESS": "0.0.0.0", "TRUST_DOMAIN": "test", "NODE_TLS_CERT_FILE": cert, "NODE_TLS_KEY_FILE": key, "NODE_TLS_CLIENT_CA_FILE": ca.File}
	for name, tc := range map[string]struct {
		change map[string]string
		want   string // in the error; empty: none
	}{
		"all":               {nil, ""},
		"nothing":           {map[string]string{"NODE_TLS_CERT_FILE": "", "NODE_TLS_KEY_FILE": "", "NODE_TLS_CLIENT_CA_FILE": ""}, "NODE_TLS_CLIENT_CA_FILE"},
		"without authority": {map[string]string{"NODE_TLS_CLIENT_CA_FILE": ""}, "NODE_TLS_CLIENT_CA_FILE"},
		"no trust domain":   {map[string]string{"TRUST_DOMAIN": ""}, "trust_domain is not set"},
		"anybody":           {map[string]string{"NODE_TLS_ALLOWED_SANS": "*"}, "NODE_TLS_ALLOWED_SANS"},
		"profiles":          {map[string]string{"PPROF_REMOTE": "true"}, "PPROF_REMOTE"},
		"profiles, inside":  {map[string]string{"PPROF_REMOTE": "true", "METRICS_ADDRESS": "127.0.0.1"}, ""},
		"etcd elsewhere":    {map[string]string{"ETCD_ENDPOINTS": "etcd:2379"}, "ETCD_ENDPOINTS"},
		"allowed": {map[string]string{
			"NODE_TLS_CERT_FILE": "", "NODE_TLS_KEY_FILE": "", "NODE_TLS_CLIENT_CA_FILE": "", "ALLOW_INSECURE": "true", "ETCD_ENDPOINTS": "etcd:2379",
		}, ""},
	} {
		env := maps.Clone(all)
		maps.Copy(env, tc.change)
		c := &Config{}
		err := cli.Fill(c, env)
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
		if name == "allowed" && len(c.insecure) != 2 {
			t.Errorf("%s: %q", name, c.insecure)
		}
	}
}
