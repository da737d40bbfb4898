package app_test

import (
	"crypto/tls"
	"fmt"
	"math/big"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/push-manager/push-manager/internal/certs"
	pubsub "github.com/push-manager/push-manager/proto"
)

// TestEverythingIsRotatedUnderLoadWithoutAFailedPush: authorities, certificates and keys of all connections. ROTATION_RATE is
// the load in pushes a second; with it the interval of reloads is that of production.
func TestEverythingIsRotatedUnderLoadWithoutAFailedPush(t *testing.T) {
	rate, interval, within := 40, "50ms", time.Minute // the machine may be busy
	if text := os.Getenv("ROTATION_RATE"); text != "" {
		var err error
		if rate, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
		interval, within = "10s", 12*time.Second
	}
	f := newFleet(t, interval)
	m := f.startPushManager(nil)
	n1 := f.node("n1", false)
	users := make([]string, max(rate/100, 1)) // nobody is cut off for being slow where all of this is one busy process
	for i := range users {
		users[i] = fmt.Sprint("alice-", i)
		f.join(n1, users[i])
	}
	eventually(t, "the node is reached", func() bool { return m.Reachable() == 1 })
	_, creds := f.caller()
	wrong := func(r *pubsub.PushToUserResponse, err error) string {
		if err != nil || !r.GetSuccess() || r.GetSummary().GetDelivered() != 1 {
			return fmt.Sprint(r, err)
		}
		return ""
	}
	pushed := func(users ...string) {
		t.Helper()
		eventually(t, "pushes arrive", func() bool {
			l := startLoad(m.GRPCAddr(), creds, 40, users, wrong)
			time.Sleep(200 * time.Millisecond)
			l.end()
			l.all.Wait()
			return l.sent.Load() > 0 && l.bad.Load() == nil
		})
	}
	for _, user := range users {
		pushed(user)
	}
	ports := map[string]string{"push API": m.GRPCAddr(), "node": n1.GRPCAddr().String(), "Controller": f.controller.GRPCAddr(), "clients of the node": n1.HTTPAddr().String()}
	managerURI := "spiffe://test/push-manager/pm"
	serials := func(pair certs.Pair) map[string]*big.Int {
		list := map[string]*big.Int{}
		for name, addr := range ports {
			cfg := as(t, pair)
			if strings.HasPrefix(name, "clients") {
				cfg.NextProtos = nil
			}
			list[name], _ = knock(addr, cfg)
		}
		return list
	}
	old := f.authority.issue(t, managerURI)
	sessions := tls.NewLRUClientSessionCache(16)
	letIn := func(pair certs.Pair, name string) bool {
		cfg := as(t, pair)
		cfg.ClientSessionCache = sessions
		_, ok := knock(ports[name], cfg)
		return ok
	}
	gRPC := []string{"push API", "node", "Controller"}
	for _, name := range gRPC {
		if !letIn(old, name) {
			t.Fatalf("%s: a good certificate is refused", name)
		}
	}
	before := serials(old)

	l, began := startLoad(m.GRPCAddr(), creds, rate, users, wrong), time.Now()
	await := func(what string, holds func() bool) {
		t.Helper()
		for began := time.Now(); !holds(); time.Sleep(20 * time.Millisecond) {
			if time.Since(began) > within {
				t.Fatalf("not within %v: %s", within, what)
			}
		}
	}
	fresh := f.next.issue(t, managerURI)
	for name := range f.parts { // 1: both authorities are trusted
		f.write(name+".ca", slices.Concat(f.authority.pair.Cert, f.next.pair.Cert))
	}
	for _, name := range gRPC {
		await("the new authority is trusted by "+name, func() bool { return letIn(fresh, name) })
	}
	time.Sleep(2 * reloads(t, interval)) // the clients of these connections, which nobody can ask
	keys := map[string][]byte{}
	for name, uri := range f.parts { // 2: the certificates, and some time later their keys
		pair := f.next.issue(t, uri)
		f.write(name+".crt", pair.Cert)
		keys[name] = pair.Key
	}
	time.Sleep(reloads(t, interval))
	for name, key := range keys {
		f.write(name+".key", key)
	}
	await("new certificates are shown everywhere", func() bool {
		now := serials(old)
		for name := range ports {
			if now[name] == nil || now[name].Cmp(before[name]) == 0 {
				return false
			}
		}
		return true
	})
	time.Sleep(2 * reloads(t, interval))
	for name := range f.parts { // 3: the old authority goes
		f.write(name+".ca", f.next.pair.Cert)
	}
	for _, name := range gRPC {
		await("the old authority is refused by "+name, func() bool { return !letIn(old, name) })
	}
	time.Sleep(2 * reloads(t, interval))

	// All connections are made anew, with what there is now: a second node comes, which trusts nothing from before.
	f.authority = f.next
	f.etcd.Restart()
	f.toController.Cut()
	f.toController.Mend()
	n2 := f.node("n2", false)
	f.join(n2, "bob")
	eventually(t, "the second node is reached, too", func() bool { return m.Reachable() == 2 })
	pushed("bob")
	l.stop(t)
	t.Logf("%d pushes in %v", l.sent.Load(), time.Since(began).Round(time.Second))
	text := metricsOf(t, m)
	for _, role := range []string{"api", "link", "controller", "etcd"} {
		if !strings.Contains(text, `push_manager_tls_reloads_total{role="`+role+`",result="ok"} 3`) {
			t.Errorf("%s has not taken three sets over", role)
		}
	}
}

// reloads is a reload interval with some spare time.
func reloads(t *testing.T, interval string) time.Duration {
	t.Helper()
	d, err := time.ParseDuration(interval)
	if err != nil {
		t.Fatal(err)
	}
	return d + 500*time.Millisecond
}
