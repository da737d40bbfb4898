package discovery

import (
	"context"
	"errors"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/push-manager/push-manager/internal/etcdtest"
)

func hold(t *testing.T, client *clientv3.Client, holder string) (*Claim, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	c, err := Hold(ctx, ClaimConfig{Client: client, Key: "/k", Holder: holder, Name: "name of " + holder, CheckInterval: 50 * time.Millisecond, RequestTimeout: 10 * time.Second})
	if err == nil {
		t.Cleanup(func() { give(t, c) })
	}
	return c, err
}

// give closes a Claim; a second time does nothing.
func give(t *testing.T, c *Claim) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := c.Close(ctx); err != nil {
		t.Error(err)
	}
}

func TestOnlyOneHolderHasAClaim(t *testing.T) {
	client := etcdtest.Start(t).Client()
	first, err := hold(t, client, "a")
	if err != nil {
		t.Fatal(err)
	}
	var taken *TakenError
	if _, err := hold(t, client, "b"); !errors.As(err, &taken) || taken.Name != "name of a" {
		t.Errorf("a second holder: %v", err)
	}
	again, err := hold(t, client, "a") // as after a kill
	if err != nil {
		t.Errorf("the same holder: %v", err)
	} else {
		give(t, again)
	}
	time.Sleep(200 * time.Millisecond) // and the first has it back
	if _, err := hold(t, client, "b"); !errors.As(err, &taken) {
		t.Errorf("a second holder, later: %v", err)
	}
	give(t, first)
	if _, err := hold(t, client, "b"); err != nil {
		t.Errorf("a holder after the first: %v", err)
	}
}

func TestAHolderWhoseKeyIsGoneTakesItBackAndOneWhoLostItIsTold(t *testing.T) {
	client := etcdtest.Start(t).Client()
	c, err := hold(t, client, "a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Delete(t.Context(), "/k"); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); valueOf(client, "/k") == ""; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the key does not come back")
		}
	}
	if _, err := client.Put(t.Context(), "/k", "no JSON"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	select {
	case <-c.Taken():
	case <-ctx.Done():
		t.Error("nobody is told")
	}
}
