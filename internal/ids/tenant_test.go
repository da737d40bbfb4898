package ids

import (
	"regexp"
	"strings"
	"testing"
)

// FuzzTenant holds the loops over bytes against the rule as a regular expression.
func FuzzTenant(f *testing.F) {
	for _, s := range []string{
		"", "a", "shop", "shop-1", "-shop", "Shop", "shop/", "shop/alice", "/alice", "a/b/c", "../b/x", "sh\u00f6p/x", "a\x00/b", "shop_1/x", "\uff53hop/x",
		strings.Repeat("a", 31), strings.Repeat("a", 32), strings.Repeat("a", 31) + "/x", strings.Repeat("a", 32) + "/x",
	} {
		f.Add(s)
	}
	name := regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,30}\z`)
	scope := regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,30}/\z`)
	scoped := regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,30}/`)
	f.Fuzz(func(t *testing.T, s string) {
		if got := CheckTenant(s) == nil; got != name.MatchString(s) || got != (CheckTenant([]byte(s)) == nil) {
			t.Errorf("%q is a tenant: %v", s, got)
		}
		if got := IsScope(s); got != scope.MatchString(s) {
			t.Errorf("%q is a scope: %v", s, got)
		}
		if got := Scoped(s); got != scoped.MatchString(s) {
			t.Errorf("%q is an id of a tenant: %v", s, got)
		}
		if CheckTenant(s) == nil && (!IsScope(Scope(s)) || !Scoped(Scope(s)+"x") || len(Scope(s))+MaxBytes > MaxScopedBytes) {
			t.Errorf("%q has the scope %q", s, Scope(s))
		}
	})
}

func TestFourTenantsLeaveRoomForOthers(t *testing.T) {
	for _, most := range []int{1, 3, 4, 16, 64, 1000, 10_000} {
		var taken, tenants int
		for ; taken < most; tenants++ {
			own := 0
			for ; taken < most && own < TenantShare(most, taken); own++ {
				taken++
			}
			if own > max(most/4, 1) {
				t.Errorf("of %d one tenant has %d", most, own)
			}
		}
		if want := min(most, 7); tenants < want {
			t.Errorf("%d places are full with %d tenants", most, tenants)
		}
	}
}
