package pushmanager

import (
	"errors"
	"testing"
	"time"

	"github.com/push-manager/push-manager/internal/etcdtest"
	"github.com/push-manager/push-manager/transport/discovery"
	"github.com/push-manager/push-manager/transport/ingress"
)

// TestATenantThatHasItsShareOfRefusalsGetsNoMore, and nobody is disconnected then.
func TestATenantThatHasItsShareOfRefusalsGetsNoMore(t *testing.T) {
	refusals := discovery.Refusals{Client: etcdtest.Start(t).Client(), Most: 4, Timeout: 10 * time.Second}
	if _, err := refusals.Refuse(t.Context(), "shop/", &discovery.Refusal{User: "shop/a", Code: 4410, Seconds: 60}); err != nil {
		t.Fatal(err)
	}
	d := disconnector{refusals: refusals} // without links: it would panic
	_, err := d.Disconnect(t.Context(), &ingress.Disconnect{Scope: "shop/", User: "shop/b", Code: 4410, RefuseFor: time.Minute})
	if !errors.Is(err, ingress.ErrManyRefusals) {
		t.Errorf("one too many: %v", err)
	}
}
